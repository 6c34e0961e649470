// Package handover (protocols) is how a process gives what it has open to its successor: values with descriptors, one
// at a time, over a Unix stream socket. At every moment one of the two owns an offer, whatever fails:
//
//	giver                                taker
//	hello, with the version      →
//	                             ←       accepted, or refused: it does not speak that version
//	offer: value and descriptors →       prepares, and starts nothing
//	                             ←       accepted; refused: the giver keeps it
//	commit                       →       starts
//
// The giver owns an offer until it has written the commit, and the taker from then on: a commit that was written is
// read, or its taker has died. A giver that breaks off before keeps the offer, and the taker discards it.
package handover

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Version is what this package speaks. It changes when an offer means something else to who reads it; fields whose zero
// value means "as before" may be added without.
const Version = 1

const (
	patience  = 10 * time.Second // for each step of the other side
	maxValue  = 128 << 20        // bytes of an offer
	maxFiles  = 1 << 14          // descriptors of an offer
	fileBatch = 250              // in one message; the kernel takes 253
)

// Kinds of messages.
const (
	kindHello    = 'h'
	kindAccepted = 'a'
	kindRefused  = 'r'
	kindOffer    = 'o'
	kindCommit   = 'c'
)

// headerLen is a kind, four bytes of how many descriptors follow, four bytes of how long the value is.
const headerLen = 9

// RefusedError is the taker's refusal, in its words.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return "the successor refused: " + e.Reason }

type hello struct{ Version int }

// conn is one end of a hand-over.
type conn struct{ *net.UnixConn }

// send writes one message.
func (c conn) send(kind byte, value []byte, files []int) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if len(value) > maxValue || len(files) > maxFiles {
		return fmt.Errorf("an offer of %d bytes and %d descriptors is too large", len(value), len(files))
	}
	h := binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(files)))
	if _, err := c.Write(binary.BigEndian.AppendUint32(h, uint32(len(value)))); err != nil {
		return err
	}
	for len(files) > 0 {
		n := min(len(files), fileBatch)
		if _, _, err := c.WriteMsgUnix([]byte{'f'}, unix.UnixRights(files[:n]...), nil); err != nil {
			return err
		}
		files = files[n:]
	}
	if len(value) == 0 {
		return nil // the message is whole, and its reader may have closed: writing nothing would fail
	}
	_, err := c.Write(value)
	return err
}

// receive reads one message. The descriptors are the caller's.
func (c conn) receive() (kind byte, value []byte, files []int, err error) {
	var h [headerLen]byte
	if _, err := io.ReadFull(c, h[:]); err != nil {
		return 0, nil, nil, err
	}
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return 0, nil, nil, err
	}
	count, size := binary.BigEndian.Uint32(h[1:]), binary.BigEndian.Uint32(h[5:])
	if count > maxFiles || size > maxValue {
		return 0, nil, nil, fmt.Errorf("a message with %d bytes and %d descriptors is too large", size, count)
	}
	for len(files) < int(count) {
		some, err := c.receiveFiles()
		if files = append(files, some...); err != nil || len(files) > int(count) {
			closeAll(files)
			return 0, nil, nil, errors.Join(err, errors.New("not the descriptors that were announced"))
		}
	}
	var b bytes.Buffer // grows with what comes, not with what is announced
	if _, err := io.CopyN(&b, c, int64(size)); err != nil {
		closeAll(files)
		return 0, nil, nil, err
	}
	return h[0], b.Bytes(), files, nil
}

// receiveFiles reads one batch of descriptors, which are closed on exec.
func (c conn) receiveFiles() (files []int, err error) {
	b, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4*(fileBatch+3)))
	n, oobn, flags, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	for i := range messages {
		some, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return files, err
		}
		files = append(files, some...)
	}
	if n != 1 || len(files) == 0 || flags&unix.MSG_CTRUNC != 0 {
		return files, errors.New("no descriptors where some must be")
	}
	return files, nil
}

func closeAll(files []int) {
	for _, fd := range files {
		unix.Close(fd)
	}
}

// trusted wants the process at the other end to be root's or of the same user.
func (c conn) trusted() error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, credErr); err != nil {
		return fmt.Errorf("read the peer's credentials: %w", err)
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Getuid() {
		return fmt.Errorf("the peer is user %d", cred.Uid)
	}
	return nil
}

// answer reads the taker's answer: nil, or a *RefusedError.
func (c conn) answer() error {
	kind, value, files, err := c.receive()
	closeAll(files)
	switch {
	case err != nil:
		return err
	case kind == kindRefused:
		return &RefusedError{Reason: string(value)}
	case kind != kindAccepted:
		return fmt.Errorf("a message of kind %q in place of an answer", kind)
	}
	return nil
}

// Giver is the giving end.
type Giver struct{ c conn }

// Dial connects to the successor that listens on a socket. It fails when there is none, or when that does not speak this
// version (*RefusedError).
func Dial(socket string) (*Giver, error) {
	u, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	g := &Giver{conn{u}}
	if err := g.greet(Version); err != nil {
		u.Close()
		return nil, fmt.Errorf("hand over to %s: %w", socket, err)
	}
	return g, nil
}

func (g *Giver) greet(version int) error {
	if err := g.c.trusted(); err != nil {
		return err
	}
	value, err := json.Marshal(hello{version})
	if err == nil {
		err = g.c.send(kindHello, value, nil)
	}
	if err != nil {
		return err
	}
	return g.c.answer()
}

// Give offers a value with descriptors, which stay the caller's. nil: the successor goes on with what they stand for, and
// the caller must not touch it any more. A *RefusedError leaves it with the caller, who may make other offers; after
// another error the Giver is of no use, and the offer the caller's as well.
func (g *Giver) Give(value any, files []int) error {
	b, err := json.Marshal(value)
	if err != nil {
		return &RefusedError{Reason: err.Error()}
	}
	defer clear(b) // it may hold secrets
	if err := g.c.send(kindOffer, b, files); err != nil {
		return err
	}
	if err := g.c.answer(); err != nil {
		return err
	}
	return g.c.send(kindCommit, nil, nil)
}

// Close ends the hand-over.
func (g *Giver) Close() { g.c.Close() }
