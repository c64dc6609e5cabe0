"""What the parts say to each other: messages, options, errors."""
