//! A kernel that the user names by a path: which release it is, and whether the headers belong to it.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};

/// The place of the magic number in a bzImage, and the magic number (`Documentation/arch/x86/boot.rst`).
const MAGIC: (usize, &[u8]) = (0x202, b"HdrS");
/// The place of the offset of the version string, a 16-bit number. It counts from 0x200.
const VERSION: usize = 0x20e;
const VERSION_BASE: usize = 0x200;
/// The header from which a module gets the release for which it is. (Others may have a release without the distributor's
/// part.)
const RELEASE_HEADER: &str = "include/generated/utsrelease.h";

/// The release (`uname -r`) of a bzImage.
///
/// # Errors
///
/// The file cannot be read, or is no bzImage.
pub(crate) fn release(image: &Path) -> Result<String> {
    let bytes = fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    release_in(&bytes).with_context(|| {
        format!(
            "{} is not a bzImage: after a build of the kernel it is arch/x86/boot/bzImage, on an installed system \
             /boot/vmlinuz-*",
            image.display()
        )
    })
}

fn release_in(image: &[u8]) -> Option<String> {
    let (place, magic) = MAGIC;
    if !image.get(place..)?.starts_with(magic) {
        return None;
    }
    let offset = u16::from_le_bytes(image.get(VERSION..VERSION + 2)?.try_into().ok()?);
    // "RELEASE (BUILDER) VERSION", with a zero at its end.
    let text = image.get(VERSION_BASE + usize::from(offset)..)?;
    let release = text.split(|byte| *byte == b' ' || *byte == 0).next()?;
    (offset != 0 && !release.is_empty()).then(|| String::from_utf8_lossy(release).into_owned())
}

/// Checks that these headers are those of this kernel.
///
/// # Errors
///
/// They are not.
pub(crate) fn check_headers(image: &Path, headers: &Path) -> Result<()> {
    let release = release(image)?;
    let text = fs::read_to_string(headers.join(RELEASE_HEADER)).with_context(|| {
        format!(
            "{} has no headers of a kernel: it needs {RELEASE_HEADER}, as /lib/modules/RELEASE/build and the directory of a \
             built kernel have it",
            headers.display()
        )
    })?;
    let theirs = text.split('"').nth(1).with_context(|| format!("{RELEASE_HEADER} does not name a release"))?;
    ensure!(
        theirs == release,
        "{} is Linux {release}, and {} has the headers of Linux {theirs}: the kernel would not load the driver",
        image.display(),
        headers.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(release: &str) -> Vec<u8> {
        let mut image = vec![0; 0x300];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x80u16.to_le_bytes());
        image.extend([0; 0x40]);
        let text = format!("{release} (user@host) #1 SMP\0");
        image[0x280..0x280 + text.len()].copy_from_slice(text.as_bytes());
        image
    }

    #[test]
    fn the_release_is_where_the_boot_protocol_has_it() {
        assert_eq!(release_in(&image("6.1.0-57-cloud-amd64")).as_deref(), Some("6.1.0-57-cloud-amd64"));
        assert_eq!(release_in(b"\x7fELF"), None);
        assert_eq!(release_in(&[0; 0x400]), None);
    }

    #[test]
    fn headers_of_another_kernel_are_refused_before_anything_is_built() {
        let directory = tempfile::tempdir().expect("a directory");
        let kernel = directory.path().join("bzImage");
        fs::write(&kernel, image("6.1.0")).expect("a file");
        let refusal = |headers: &Path| format!("{:#}", check_headers(&kernel, headers).expect_err("refused"));
        assert!(refusal(directory.path()).contains("has no headers of a kernel"));
        fs::create_dir_all(directory.path().join("include/generated")).expect("a directory");
        let place = directory.path().join(RELEASE_HEADER);
        fs::write(&place, "#define UTS_RELEASE \"6.12.1\"\n").expect("a file");
        assert!(refusal(directory.path()).contains("is Linux 6.1.0, and"));
        fs::write(&place, "#define UTS_RELEASE \"6.1.0\"\n").expect("a file");
        check_headers(&kernel, directory.path()).expect("the same release");
    }
}
