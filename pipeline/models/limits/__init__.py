"""The sizes of images and batches that a network takes."""
