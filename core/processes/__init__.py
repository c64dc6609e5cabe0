"""Who runs where: root and its children, and all of it in one process."""
