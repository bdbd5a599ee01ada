"""What a training step of LED keeps is counted here, tensor by tensor, and predicted from the sizes of the model."""
