package zds

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
)

// Listen listens on a Unix socket that at no moment can be opened by anyone but its owner (0600): it is made in a directory
// of its own and then moved to its place, where it replaces one that a former process left behind. network is unix or
// unixpacket.
func Listen(network, socket string) (*net.UnixListener, error) {
	dir := filepath.Dir(socket)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", socket, err)
	}
	private, err := os.MkdirTemp(dir, ".new-")
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", socket, err)
	}
	defer os.RemoveAll(private)
	made := filepath.Join(private, "s")
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: made, Net: network})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", socket, err)
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(made, 0o600)
	if err == nil {
		err = os.Rename(made, socket)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("listen on %s: %w", socket, err)
	}
	return l, nil
}
