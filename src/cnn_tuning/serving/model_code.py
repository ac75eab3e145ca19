"""What MLflow runs to load the model ("models from code"): no pickle is involved."""

import mlflow.models

from cnn_tuning.serving.pyfunc import ImageClassifier

mlflow.models.set_model(ImageClassifier())
