"""A trained model in use: lists of images and texts encoded, compared, scored and ranked."""
