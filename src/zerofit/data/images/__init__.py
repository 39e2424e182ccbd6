"""Pictures: found in folders (`discover`), decoded (`decode`), kept (`store`), sampled (`dataset`), read (`loader`)."""
