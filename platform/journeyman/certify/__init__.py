"""From calibrated probabilities to a certified policy bundle: numpy and scipy only."""
