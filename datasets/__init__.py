"""Data that is read: annotation files, images, captions, and the metrics of each task. Import the submodules by name."""
