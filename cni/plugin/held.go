package plugin

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// A pod that waits is tried again and again. That the API server had it in the mesh is remembered, by an empty file of the pod's
// UID beside the access to the API server, so that it goes on waiting when that server is away too.

func heldDir(access string) string { return filepath.Join(filepath.Dir(access), "held") }

// remember keeps what the API server last said of a pod.
func remember(access, uid string, member bool) error {
	if !plain(uid) {
		return nil // a runtime that gives no UID
	}
	path := filepath.Join(heldDir(access), uid)
	if !member {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("forget that pod %s is of the mesh: %w", uid, err)
		}
		return nil
	}
	if err := mark(path); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("remember that pod %s is of the mesh: %w", uid, err)
	}
	return nil
}

// mark makes an empty file that is there after a power cut.
func mark(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// held tells whether the API server had the pod in the mesh when it last answered.
func held(access, uid string) bool {
	if !plain(uid) {
		return false
	}
	_, err := os.Lstat(filepath.Join(heldDir(access), uid))
	return err == nil
}

// ForgetHeld removes what the plugin remembers beside an access to the API server. It is for an agent whose record has all pods.
func ForgetHeld(access string) error {
	if err := os.RemoveAll(heldDir(access)); err != nil {
		return fmt.Errorf("remove what the plugin remembers: %w", err)
	}
	return nil
}
