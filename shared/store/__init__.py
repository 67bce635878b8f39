"""Files of any size under keys: in a folder, or in an S3-compatible store."""
