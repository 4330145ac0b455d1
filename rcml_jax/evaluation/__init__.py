"""Arrays in, numbers out: ranking, retrieval, relations and probes."""
