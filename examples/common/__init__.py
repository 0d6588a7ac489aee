"""What all demos share: data, augmentation, evaluation, measurement and the report."""
