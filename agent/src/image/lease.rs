//! Layers that running pulls count on: what is leased is not removed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::id::Digest;

/// How many pulls count on each layer, by diff ID.
#[derive(Clone, Default)]
pub(crate) struct Leases(Arc<Mutex<HashMap<Digest, usize>>>);

impl Leases {
    /// Leases `layers` until the value is dropped. Taken under the planning lock, so that a removal
    /// has either seen it or finished before.
    pub(crate) fn take(&self, layers: &[Digest]) -> Lease {
        let mut leases = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for layer in layers {
            *leases.entry(layer.clone()).or_default() += 1;
        }
        Lease {
            leases: self.clone(),
            layers: layers.to_vec(),
        }
    }

    pub(crate) fn holds(&self, layer: &Digest) -> bool {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains_key(layer)
    }
}

/// Some layers, as long as it lives.
pub(crate) struct Lease {
    leases: Leases,
    layers: Vec<Digest>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut leases = self.leases.0.lock().unwrap_or_else(PoisonError::into_inner);
        for layer in &self.layers {
            if let Some(count) = leases.get_mut(layer) {
                *count -= 1;
                if *count == 0 {
                    leases.remove(layer);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_held_until_its_last_lease_ends() {
        let leases = Leases::default();
        let layer = Digest::of(b"a");
        let one = leases.take(&[layer.clone(), layer.clone()]);
        let two = leases.take(std::slice::from_ref(&layer));
        drop(one);
        assert!(leases.holds(&layer));
        drop(two);
        assert!(!leases.holds(&layer));
    }
}
