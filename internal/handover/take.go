package handover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

// Prepared is an offer that waits for its commit. Exactly one of its functions is called.
type Prepared struct {
	Start, Discard func()
}

// Prepare makes an offer ready to go on here, without anything that the giver or others would notice. The descriptors are
// the callee's if it returns no error.
type Prepare func(value []byte, files []int) (*Prepared, error)

// Listen takes the name of a socket over from whoever listened on it before, at once: a giver finds one of the two. Only
// the owner may connect (0600).
func Listen(socket string) (*Listener, error) {
	next := fmt.Sprintf("%s.%d.%d", socket, os.Getpid(), time.Now().UnixNano())
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: next, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // by then it has another name, or is another's
	own := &Listener{UnixListener: l, socket: socket}
	if err = os.Chmod(next, 0o600); err == nil {
		own.file, err = os.Stat(next)
	}
	if err == nil {
		err = os.Rename(next, socket)
	}
	if err != nil {
		l.Close()
		return nil, errors.Join(err, os.Remove(next))
	}
	return own, nil
}

// Listener is where givers come. Close gives the name up, if it is still this one's.
type Listener struct {
	*net.UnixListener
	socket string
	file   os.FileInfo
}

// Close stops listening.
func (l *Listener) Close() error {
	if now, err := os.Stat(l.socket); err == nil && os.SameFile(now, l.file) {
		_ = os.Remove(l.socket) // a name that leads nowhere is no successor either
	}
	return l.UnixListener.Close()
}

// Take takes what the giver at the other end of u offers, until it breaks off (nil) or ctx ends. It owns u.
func Take(ctx context.Context, u *net.UnixConn, prepare Prepare) error {
	defer u.Close()
	c := conn{u}
	if err := c.trusted(); err != nil {
		return fmt.Errorf("take over: %w", err)
	}
	if err := c.welcome(); err != nil {
		return fmt.Errorf("take over: %w", err)
	}
	for {
		if err := u.SetReadDeadline(time.Time{}); err != nil {
			return nil
		}
		// ctx ends the waiting for an offer, and never one that is accepted.
		stop := context.AfterFunc(ctx, func() { _ = u.SetReadDeadline(time.Unix(1, 0)) })
		kind, value, files, err := c.receive()
		switch {
		case err != nil:
			return nil // what was committed is taken, and the rest is the giver's
		case !stop():
			closeAll(files)
			return nil
		case kind != kindOffer:
			closeAll(files)
			return fmt.Errorf("take over: a message of kind %q in place of an offer", kind)
		}
		if err := c.take(value, files, prepare); err != nil {
			return fmt.Errorf("take over: %w", err)
		}
	}
}

// welcome reads the giver's hello and answers it.
func (c conn) welcome() error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	kind, value, files, err := c.receive()
	closeAll(files)
	if err != nil {
		return err
	}
	var h hello
	if kind != kindHello || json.Unmarshal(value, &h) != nil {
		return errors.New("not a hello")
	}
	if h.Version != Version {
		reason := fmt.Sprintf("it speaks version %d, and this is %d", Version, h.Version)
		return errors.Join(errors.New(reason), c.send(kindRefused, []byte(reason), nil))
	}
	return c.send(kindAccepted, nil, nil)
}

// take answers one offer and waits for its commit.
func (c conn) take(value []byte, files []int, prepare Prepare) error {
	p, err := prepare(value, files)
	clear(value) // it may hold secrets
	if err != nil {
		closeAll(files)
		return c.send(kindRefused, []byte(err.Error()), nil)
	}
	if err := c.send(kindAccepted, nil, nil); err != nil {
		p.Discard()
		return err
	}
	// However long it takes: the giver writes it or is gone, and a patience that ends here might end while it is written.
	var kind byte
	var more []int
	if err = c.SetReadDeadline(time.Time{}); err == nil {
		kind, _, more, err = c.receive()
		closeAll(more)
	}
	if err != nil || kind != kindCommit {
		p.Discard()
		if err == nil {
			err = fmt.Errorf("a message of kind %q in place of a commit", kind)
		}
		return fmt.Errorf("an offer was not committed: %w", err)
	}
	p.Start()
	return nil
}
