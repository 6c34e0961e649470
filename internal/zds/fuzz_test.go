package zds

import (
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/fairlead-mesh/fairlead/api/zds"
)

// FuzzReceive has an agent that sends any bytes, with a descriptor beside them or without: the proxy understands them or
// not, and no descriptor is lost.
func FuzzReceive(f *testing.F) {
	for _, m := range []*zds.WorkloadRequest{
		{Payload: &zds.WorkloadRequest_Add{Add: &zds.AddWorkload{Uid: "u", WorkloadInfo: &zds.WorkloadInfo{Name: "n", Namespace: "s", ServiceAccount: "a"}}}},
		{Payload: &zds.WorkloadRequest_Del{Del: &zds.DelWorkload{Uid: "u"}}},
		{Payload: &zds.WorkloadRequest_SnapshotSent{SnapshotSent: &zds.SnapshotSent{}}},
	} {
		body, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(body, true)
	}
	f.Add([]byte{0xff}, false)
	f.Fuzz(func(t *testing.T, body []byte, descriptor bool) {
		if len(body) == 0 || len(body) > 100<<10 {
			return
		}
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		agent, proxy := unixConn(t, pair[0]), unixConn(t, pair[1])
		var rights []byte
		if descriptor {
			rights = unix.UnixRights(pair[0])
		}
		if _, _, err := agent.WriteMsgUnix(body, rights, nil); err != nil {
			t.Fatal(err)
		}
		var m zds.WorkloadRequest
		files, err := receive(proxy, &m)
		if err == nil && (len(files) == 1) != descriptor {
			t.Errorf("%d descriptors came, sent %v", len(files), descriptor)
		}
		if err != nil && len(files) > 0 {
			t.Error("descriptors of a message that was refused")
		}
		if err == nil && len(body) > maxMessage {
			t.Errorf("a message of %d bytes was taken", len(body))
		}
		closeAll(files)
	})
}

func unixConn(t *testing.T, fd int) *net.UnixConn {
	t.Helper()
	file := os.NewFile(uintptr(fd), "socket")
	conn, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close(); conn.Close() })
	return conn.(*net.UnixConn)
}
