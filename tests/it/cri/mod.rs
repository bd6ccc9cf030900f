//! The CRI contract, paragraph by paragraph: each test names in its doc comment what it shows.

mod volumes;
