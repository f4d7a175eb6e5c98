from .check import (
    as_batch as as_batch,
    as_constant as as_constant,
    as_dtype as as_dtype,
    as_floats as as_floats,
    as_shape as as_shape,
    check_choice as check_choice,
    check_count as check_count,
    check_instance as check_instance,
    check_key as check_key,
    check_not_negative as check_not_negative,
    check_not_traced as check_not_traced,
    check_per_sample as check_per_sample,
    check_positive as check_positive,
    constant_field as constant_field,
    error_if_any as error_if_any,
    is_integer as is_integer,
)
from .pin import pin as pin
from .renamed import renamed as renamed
from .show import show as show
from .write import write_whole as write_whole
