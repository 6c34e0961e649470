package tlsrecord

import (
	"bytes"
	"errors"
	"fmt"
)

// State is a Conn as a value, so that another process can go on with it. It holds the traffic secrets.
type State struct {
	Suite      uint16
	In, Out    []byte // traffic secrets of the present generation
	InSeq      uint64 // of the next record
	OutSeq     uint64
	Message    []byte `json:",omitempty"` // of a post-handshake message that is not whole yet
	Useless    int    `json:",omitempty"`
	OwesUpdate bool   `json:",omitempty"`
}

// Export is c's state; c must not be used on both sides afterwards. It fails on a connection that has ended.
func (c *Conn) Export() (State, error) {
	if c.final != nil {
		return State{}, fmt.Errorf("export TLS state: %w", c.final)
	}
	return State{Suite: c.in.suite.id, In: bytes.Clone(c.in.secret), Out: bytes.Clone(c.out.secret), InSeq: c.in.seq,
		OutSeq: c.out.seq, Message: bytes.Clone(c.message), Useless: c.useless, OwesUpdate: c.owed}, nil
}

// Import makes a Conn that goes on where the exported one stood. It owns the secrets.
func Import(s State) (*Conn, error) {
	if len(s.Message) > maxMessage || s.Useless < 0 || s.Useless > maxUseless {
		return nil, errors.New("import TLS state: out of bounds")
	}
	c, err := New(s.Suite, s.In, s.Out)
	if err != nil {
		return nil, fmt.Errorf("import TLS state: %w", err)
	}
	if n := c.in.suite.hash().Size(); len(s.In) != n || len(s.Out) != n {
		return nil, errors.New("import TLS state: secrets of the wrong length")
	}
	c.in.seq, c.out.seq = s.InSeq, s.OutSeq
	c.useless, c.owed = s.Useless, s.OwesUpdate
	if len(s.Message) > 0 {
		c.message = s.Message
	}
	return c, nil
}

// Clear overwrites the secrets.
func (s *State) Clear() {
	clear(s.In)
	clear(s.Out)
}
