"""One file for each kind of curvature, built from the loss and the samples."""
