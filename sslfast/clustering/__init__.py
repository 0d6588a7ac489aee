"""Clusters of features, and labels from them: k-means on the nearest-neighbour kernel, self-labelling by Sinkhorn."""
