"""What the controller's commands do, from the SQE to the completion: a file for each group of them."""
