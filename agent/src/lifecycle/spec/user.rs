//! Who a container runs as: names and numbers, looked up in the image's own files.
//!
//! The files are the image's, so hostile: lines that do not parse do not exist, the first match
//! wins, and all that they can do is to name numbers inside their own container.

use std::collections::BTreeSet;

use super::{
    super::container::{User, UserWish},
    SpecError,
};

/// -1 means "no change" to the kernel and is nobody's number.
const NO_ID: u32 = u32::MAX;
const ID: &str = "a number below 4294967295";

/// Looks up who is wished. `image_user` is the image's `user[:group]`, taken if nobody is wished.
///
/// A name must be in the image's `/etc/passwd`; a number need not, and then has group 0 and home
/// `/`.
///
/// # Errors
/// `UnknownUser`, `UnknownGroup`, `GroupWithoutUser`, `InvalidValue`.
///
/// Source: CRI `LinuxContainerSecurityContext`; passwd(5), group(5).
pub fn resolve_user(
    wish: &UserWish,
    image_user: &str,
    passwd: Option<&[u8]>,
    group: Option<&[u8]>,
) -> Result<User, SpecError> {
    let name = wish.name.as_deref().filter(|name| !name.is_empty());
    let by_number = wish.uid.map(|uid| uid.to_string());
    let text = match (name, by_number.as_deref()) {
        (Some(name), _) => name,
        (None, Some(uid)) => uid,
        (None, None) => {
            if let Some(gid) = wish.gid {
                return Err(SpecError::GroupWithoutUser { gid });
            }
            image_user
        }
    };
    let (user, group_text) = text.split_once(':').unwrap_or((text, ""));
    let user = if user.is_empty() { "0" } else { user };

    let (uid, entry) = find_user(user, passwd.unwrap_or_default())?;
    let gid = match (wish.gid, group_text) {
        (Some(gid), _) => valid("user.gid", gid)?,
        (None, "") => entry.as_ref().map_or(0, |entry| entry.gid),
        (None, text) => find_group(text, group.unwrap_or_default())?,
    };

    let mut groups = BTreeSet::from([gid]);
    for &gid in &wish.supplemental_gids {
        groups.insert(valid("user.supplemental_gids", gid)?);
    }
    if let Some(entry) = entry.as_ref().filter(|_| !wish.strict_groups) {
        groups.extend(groups_of(entry.name, group.unwrap_or_default()));
    }
    Ok(User {
        uid,
        gid,
        supplemental_gids: groups.into_iter().collect(),
        home: entry.map_or_else(|| "/".to_owned(), |entry| entry.home),
    })
}

/// A line of `/etc/passwd`.
struct Entry<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: String,
}

fn find_user<'a>(text: &str, passwd: &'a [u8]) -> Result<(u32, Option<Entry<'a>>), SpecError> {
    if let Some(uid) = number("user", text)? {
        return Ok((uid, entries(passwd).find(|entry| entry.uid == uid)));
    }
    match entries(passwd).find(|entry| entry.name == text.as_bytes()) {
        Some(entry) => Ok((entry.uid, Some(entry))),
        None => Err(SpecError::UnknownUser {
            name: text.chars().take(200).collect(),
        }),
    }
}

fn find_group(text: &str, group: &[u8]) -> Result<u32, SpecError> {
    if let Some(gid) = number("group", text)? {
        return Ok(gid);
    }
    group_lines(group)
        .find(|(name, ..)| *name == text.as_bytes())
        .map(|(_, gid, _)| gid)
        .ok_or_else(|| SpecError::UnknownGroup {
            name: text.chars().take(200).collect(),
        })
}

fn groups_of<'a>(user: &'a [u8], group: &'a [u8]) -> impl Iterator<Item = u32> + 'a {
    group_lines(group)
        .filter(move |(_, _, members)| {
            members
                .split(|&b| b == b',')
                .any(|member| member.trim_ascii() == user)
        })
        .map(|(_, gid, _)| gid)
}

/// What is all digits is a number, never a name; one that does not fit is an error.
fn number(field: &str, text: &str) -> Result<Option<u32>, SpecError> {
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(None);
    }
    match id(text.as_bytes()) {
        Some(id) => Ok(Some(id)),
        None => Err(SpecError::invalid(field, text, ID)),
    }
}

fn valid(field: &str, id: u32) -> Result<u32, SpecError> {
    if id == NO_ID {
        return Err(SpecError::invalid(field, id, ID));
    }
    Ok(id)
}

fn id(text: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(text).ok()?;
    // `parse` alone would take a sign.
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|&id| id != NO_ID)
}

fn lines(file: &[u8]) -> impl Iterator<Item = &[u8]> {
    file.split(|&b| b == b'\n')
        .map(<[u8]>::trim_ascii_end)
        // Comments, and the NIS lines of old.
        .filter(|line| !line.is_empty() && !matches!(line[0], b'#' | b'+' | b'-' | b':'))
}

fn entries(passwd: &[u8]) -> impl Iterator<Item = Entry<'_>> {
    lines(passwd).filter_map(|line| {
        let fields: Vec<_> = line.split(|&b| b == b':').collect();
        let [name, _, uid, gid, ref rest @ ..] = fields[..] else {
            return None;
        };
        let home = rest
            .get(1)
            .and_then(|home| std::str::from_utf8(home).ok())
            .filter(|home| home.starts_with('/') && !home.contains('\0'))
            .unwrap_or("/");
        Some(Entry {
            name,
            uid: id(uid)?,
            gid: id(gid)?,
            home: home.to_owned(),
        })
    })
}

fn group_lines(group: &[u8]) -> impl Iterator<Item = (&[u8], u32, &[u8])> {
    lines(group).filter_map(|line| {
        let mut fields = line.splitn(4, |&b| b == b':');
        let (name, _, gid) = (fields.next()?, fields.next()?, fields.next()?);
        Some((name, id(gid)?, fields.next().unwrap_or_default()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bin:x:2:2:bin:/bin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
";
    const GROUP: &[u8] = b"\
root:x:0:
daemon:x:1:
bin:x:2:
wheel:x:10:root
utmp:x:43:
staff:x:50:
www-data:x:33:
audio:x:29:bin,www-data
nobody:x:65534:
";

    fn name(name: &str) -> UserWish {
        UserWish {
            name: Some(name.to_owned()),
            ..UserWish::default()
        }
    }

    fn uid(uid: u32) -> UserWish {
        UserWish {
            uid: Some(uid),
            ..UserWish::default()
        }
    }

    fn find(wish: &UserWish, image_user: &str) -> Result<User, SpecError> {
        resolve_user(wish, image_user, Some(PASSWD), Some(GROUP))
    }

    /// The results of `id -G` in busybox, as other CRI runtimes have them.
    #[test]
    fn groups_of_busybox() {
        let none = UserWish::default();
        for (wish, supplemental, merged, strict) in [
            (none.clone(), vec![], vec![0, 10], vec![0]),
            (none, vec![1, 1234], vec![0, 1, 10, 1234], vec![0, 1, 1234]),
            (uid(1234), vec![], vec![0], vec![0]),
            (
                UserWish {
                    gid: Some(1234),
                    ..uid(1234)
                },
                vec![],
                vec![1234],
                vec![1234],
            ),
            (uid(1234), vec![1234], vec![0, 1234], vec![0, 1234]),
            (name("daemon"), vec![], vec![1], vec![1]),
            (name("daemon"), vec![1234], vec![1, 1234], vec![1, 1234]),
            (name("www-data"), vec![], vec![29, 33], vec![33]),
        ] {
            for (strict_groups, expected) in [(false, merged), (true, strict)] {
                let wish = UserWish {
                    supplemental_gids: supplemental.clone(),
                    strict_groups,
                    ..wish.clone()
                };
                let user = find(&wish, "").expect("known");
                assert_eq!(user.supplemental_gids, expected, "{wish:?}");
                assert!(user.supplemental_gids.contains(&user.gid), "{wish:?}");
            }
        }
    }

    #[test]
    fn name_wins_over_number_and_both_over_the_image() {
        for (wish, image_user, expected) in [
            (UserWish::default(), "", (0, 0, "/root")),
            (UserWish::default(), "www-data", (33, 33, "/var/www")),
            (UserWish::default(), "33", (33, 33, "/var/www")),
            (UserWish::default(), "www-data:staff", (33, 50, "/var/www")),
            (UserWish::default(), "33:7", (33, 7, "/var/www")),
            (UserWish::default(), "1234:7", (1234, 7, "/")),
            (UserWish::default(), ":staff", (0, 50, "/root")),
            (uid(2), "www-data:staff", (2, 2, "/bin")),
            (uid(4_294_967_294), "", (4_294_967_294, 0, "/")),
            (name("bin"), "www-data", (2, 2, "/bin")),
            (name("bin:staff"), "", (2, 50, "/bin")),
            (name(""), "bin", (2, 2, "/bin")),
            (
                UserWish {
                    uid: Some(33),
                    gid: Some(9),
                    ..name("bin:staff")
                },
                "",
                (2, 9, "/bin"),
            ),
        ] {
            let user = find(&wish, image_user).expect("known");
            assert_eq!(
                (user.uid, user.gid, user.home.as_str()),
                expected,
                "{wish:?} {image_user:?}"
            );
        }
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let gid_only = UserWish {
            gid: Some(5),
            ..UserWish::default()
        };
        let bad_group = UserWish {
            supplemental_gids: vec![u32::MAX],
            ..UserWish::default()
        };
        for (wish, image_user, expected) in [
            (name("ghost"), "", "user \"ghost\""),
            (UserWish::default(), "ghost", "user \"ghost\""),
            (UserWish::default(), "bin:ghosts", "group \"ghosts\""),
            (gid_only, "bin", "group 5 is specified without a user"),
            (uid(u32::MAX), "", "user is \"4294967295\""),
            (name("99999999999"), "", "user is \"99999999999\""),
            (bad_group, "", "user.supplemental_gids is \"4294967295\""),
        ] {
            let error = find(&wish, image_user).expect_err(expected).to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn an_image_without_user_files_knows_numbers_only() {
        let user = resolve_user(&uid(7), "", None, None).expect("a number");
        assert_eq!((user.uid, user.gid, user.home.as_str()), (7, 0, "/"));
        assert!(resolve_user(&name("root"), "", None, None).is_err());
    }

    #[test]
    fn lines_that_do_not_parse_do_not_exist() {
        let passwd = b"\
\xff\xfe:x:5:5::/a:
#ada:x:1:1::/a:
+ada:x:1:1::/a:
:x:9:9::/a:
ada
ada:x:-1:0::/a:
ada:x:+1:0::/a:
ada:x:4294967295:0::/a:
ada:x:99999999999999999999:0::/a:
ada:x:6:seven::/a:
ada:x:6:7:too:many:fields:in:this:line
ada:x:8:8::/later:
bob:x:10:10\r
eve:x:11:11::/ho\xffme:/bin/sh
nul:x:12:12::/a\0b:/bin/sh";
        let group = b"\nx\nwheel:x:-5:ada\nwheel:x:20:ada, bob ,ada\r\nno:x:21\n";
        for (user, expected) in [
            ("ada", Some((6, 7, "/", vec![7, 20]))),
            ("bob", Some((10, 10, "/", vec![10, 20]))),
            ("eve", Some((11, 11, "/", vec![11]))),
            ("nul", Some((12, 12, "/", vec![12]))),
            ("#ada", None),
            ("+ada", None),
        ] {
            let found = resolve_user(&name(user), "", Some(passwd), Some(group))
                .ok()
                .map(|user| (user.uid, user.gid, user.home, user.supplemental_gids));
            let expected =
                expected.map(|(uid, gid, home, groups)| (uid, gid, home.to_owned(), groups));
            assert_eq!(found, expected, "{user}");
        }
    }

    #[test]
    fn a_newline_in_a_name_matches_nothing() {
        assert!(find(&name("ghost\nroot"), "").is_err());
        assert!(find(&name("root:x:0:0"), "").is_err());
    }
}
