"""What two methods share."""
