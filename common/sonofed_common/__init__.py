"""What hospital and coordinator must agree on: contract, models, data, training and metrics."""
