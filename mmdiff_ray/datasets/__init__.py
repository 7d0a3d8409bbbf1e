"""Data sets that ship: readers of folders and layouts, embedders, generated scenes."""
