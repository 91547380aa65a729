"""What taking structures out of a network needs: constants to fold, a comparison."""
