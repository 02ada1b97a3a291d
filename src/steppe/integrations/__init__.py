"""One file a framework: what runs both passes where the framework calls ``step()`` by itself."""
