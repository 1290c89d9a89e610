"""What a site does for each action: one function an action, all over one `Site`."""
