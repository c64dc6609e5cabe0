"""The microkernel itself: actors, hosts, wiring, frames, links, the device queue."""
