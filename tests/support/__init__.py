"""What the tests share: models and their laws, engines, processes beside the session."""
