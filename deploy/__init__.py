"""Several engines behind one API, on Ray Serve, and recipes to run the server as a service."""
