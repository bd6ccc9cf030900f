//! Messages with secrets print who, never with what.

use std::fmt::{Debug, Formatter, Result};

use crate::{
    cri::v1::AuthConfig,
    longshore::v1::{BasicAuth, RegistryAuth, registry_auth::Credential},
};

/// What stands for a secret: that there is one, or that there is none.
fn hidden(secret: &str) -> &'static str {
    if secret.is_empty() { "" } else { "hidden" }
}

impl Debug for AuthConfig {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("AuthConfig")
            .field("username", &self.username)
            .field("password", &hidden(&self.password))
            .field("auth", &hidden(&self.auth))
            .field("server_address", &self.server_address)
            .field("identity_token", &hidden(&self.identity_token))
            .field("registry_token", &hidden(&self.registry_token))
            .finish()
    }
}

impl Debug for BasicAuth {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("BasicAuth")
            .field("username", &self.username)
            .field("password", &hidden(&self.password))
            .finish()
    }
}

impl Debug for RegistryAuth {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("RegistryAuth")
            .field("credential", &self.credential)
            .finish()
    }
}

impl Debug for Credential {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Self::Basic(basic) => f.debug_tuple("Basic").field(basic).finish(),
            Self::IdentityToken(token) => f
                .debug_tuple("IdentityToken")
                .field(&hidden(token))
                .finish(),
            Self::RegistryToken(token) => f
                .debug_tuple("RegistryToken")
                .field(&hidden(token))
                .finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cri, longshore::v1::PullImageRequest};

    #[test]
    fn a_secret_is_never_printed() {
        let native = |credential| {
            let auth = Some(RegistryAuth {
                credential: Some(credential),
            });
            format!(
                "{:?}",
                PullImageRequest {
                    auth,
                    ..Default::default()
                }
            )
        };
        let secret = || "s3cret".to_owned();
        let cri = AuthConfig {
            username: "jane".to_owned(),
            password: secret(),
            auth: secret(),
            identity_token: secret(),
            registry_token: secret(),
            ..Default::default()
        };
        let cri = cri::v1::PullImageRequest {
            auth: Some(cri),
            ..Default::default()
        };
        for printed in [
            native(Credential::Basic(BasicAuth {
                username: "jane".to_owned(),
                password: secret(),
            })),
            native(Credential::IdentityToken(secret())),
            native(Credential::RegistryToken(secret())),
            format!("{cri:?}"),
        ] {
            assert!(
                printed.contains("hidden") && !printed.contains("s3cret"),
                "{printed}"
            );
        }
    }
}
