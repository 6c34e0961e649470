// Package zds (protocols) is how a node's CNI agent hands pods to the node proxy: both ends of api/zds/zds.proto over a
// SOCK_SEQPACKET Unix socket, one message a packet, a pod's network namespace beside its message (SCM_RIGHTS).
package zds

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// DefaultSocket is where the agent listens, as Istio's does.
const DefaultSocket = "/var/run/ztunnel/ztunnel.sock"

const (
	// maxMessage bounds one packet, in bytes. The largest is an AddWorkload of names of at most 253 bytes each.
	maxMessage = 16 << 10
	// answerTimeout is how long a proxy may take for one request, and an agent for its part of the greeting.
	answerTimeout = 30 * time.Second
)

// Workload is one pod as the agent knows it.
type Workload struct {
	// UID is the pod's metadata.uid.
	UID            string
	Name           string
	Namespace      string
	ServiceAccount string
	// Netns is the pod's network namespace.
	Netns *os.File
}

// send writes one message, with fd beside it unless fd is negative.
func send(conn *net.UnixConn, m proto.Message, fd int) error {
	body, err := proto.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	var rights []byte
	if fd >= 0 {
		rights = unix.UnixRights(fd)
	}
	if err := conn.SetWriteDeadline(time.Now().Add(answerTimeout)); err != nil {
		return err
	}
	if _, _, err := conn.WriteMsgUnix(body, rights, nil); err != nil {
		return fmt.Errorf("send message: %w", err)
	}
	return nil
}

// receive reads one message into m. The descriptors that came beside it are the caller's. A message that does not fit
// is an error: what is left of it would be read as something else.
func receive(conn *net.UnixConn, m proto.Message) ([]*os.File, error) {
	body := make([]byte, maxMessage)
	control := make([]byte, unix.CmsgSpace(8*4))
	n, cn, flags, _, err := conn.ReadMsgUnix(body, control)
	if err != nil {
		return nil, err
	}
	files, err := received(control[:cn])
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = errors.New("message is too long")
	}
	if err == nil {
		err = proto.Unmarshal(body[:n], m)
	}
	if err != nil {
		closeAll(files)
		return nil, fmt.Errorf("receive message: %w", err)
	}
	return files, nil
}

// received takes the descriptors out of a control message.
func received(control []byte) ([]*os.File, error) {
	if len(control) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, fmt.Errorf("parse control message: %w", err)
	}
	var files []*os.File
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue // another kind of control message
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "pod network namespace"))
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
