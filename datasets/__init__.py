"""Data of each task: annotation files, images, captions, and the metrics of each task. Import the submodules by name."""
