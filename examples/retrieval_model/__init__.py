"""Parts of ``train_retrieval_model.py``, which says what they are for."""
