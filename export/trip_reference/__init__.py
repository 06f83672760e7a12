"""The PyTorch reference of TRIP: model, demo data, training, evaluation."""
