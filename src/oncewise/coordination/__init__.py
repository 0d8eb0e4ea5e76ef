"""What workers share beside the database: ports between them, and what carries them."""
