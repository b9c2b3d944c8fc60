"""Does it learn? Pretraining for equal time, probed on the way, and the records of it."""
