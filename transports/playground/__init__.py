"""The page at /: a chat with the server's controls, gauges and timelines, in plain HTML, CSS and ES modules that load nothing from anywhere else."""
