//! CRI's `Signal` enumeration and the kernel's numbers.

use longshore_proto::cri::v1 as cri;

use crate::signal;

/// Kernel number of a CRI signal; none for `RUNTIME_DEFAULT`.
pub(super) fn number(value: cri::Signal) -> Option<i32> {
    let name = value.as_str_name().strip_prefix("SIGNAL_")?;
    signal::number(&name.replace("PLUS", "+").replace("MINUS", "-"))
}

/// CRI's value for a kernel number.
pub(super) fn value(number: i32) -> cri::Signal {
    signal::name(number)
        .map(|name| format!("SIGNAL_{}", name.replace('+', "PLUS").replace('-', "MINUS")))
        .and_then(|name| cri::Signal::from_str_name(&name))
        .unwrap_or(cri::Signal::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_of_cri_has_a_number_and_comes_back() {
        for raw in 1..=65 {
            let signal = cri::Signal::try_from(raw).expect("a value of the enumeration");
            let found =
                number(signal).unwrap_or_else(|| panic!("{} has no number", signal.as_str_name()));
            assert_eq!(
                number(value(found)),
                Some(found),
                "{}",
                signal.as_str_name()
            );
        }
        assert_eq!(number(cri::Signal::RuntimeDefault), None);
        assert_eq!(value(15), cri::Signal::Sigterm);
    }
}
