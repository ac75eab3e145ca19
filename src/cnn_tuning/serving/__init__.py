"""A trained bundle in; an MLflow model, a folder's predictions or an HTTP server out."""
