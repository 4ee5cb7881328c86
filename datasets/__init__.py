"""Data and metrics of each task: annotation files, images and captions. Import the submodules by name."""
