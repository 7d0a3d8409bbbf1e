"""The modality types: one file each. A module in this package is found and registered by itself."""
