"""Operations whose ranks cannot just run the operator on their parts."""
