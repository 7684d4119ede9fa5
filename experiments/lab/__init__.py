"""What the experiments share: their command line, training runs, the judge of samples, pictures."""
