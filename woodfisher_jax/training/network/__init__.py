"""One classifier as a run sees it: its loss and a step of training."""
