"""The hospital's side: images stay here, only what its enclave lets out leaves."""
