"""What the commands of the recipes share."""
