"""The microkernel: actors, messages, hosts, links, supervisor, hooks. Imports neither torch nor plugins, kernels or transports."""
