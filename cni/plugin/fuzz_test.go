package plugin

import (
	"net/netip"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
)

// FuzzStdin gives the plugin configurations and arguments that no sane runtime would.
func FuzzStdin(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.0.0","name":"lab","type":"cni-plugin","eventSocket":"/run/e.sock","excludeNamespaces":["kube-system"],"timeoutSeconds":3,
"prevResult":{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/run/netns/x"}],"ips":[{"address":"10.0.0.2/24","interface":0},{"address":"fd00::2/64"}]}}`),
		"K8S_POD_NAME=a;K8S_POD_NAMESPACE=b;K8S_POD_UID=c;IgnoreUnknown=1")
	f.Add([]byte(`{"cniVersion":"0.4.0","prevResult":{"ips":[{"version":"4","address":"::ffff:10.0.0.2/120"}]}}`), "")
	f.Add([]byte(`{"cniVersion":"1.1.0","prevResult":{"ips":[{"interface":-1,"address":"10.0.0.2/24"}]}}`), "x")
	f.Fuzz(func(t *testing.T, stdin []byte, args string) {
		conf, err := parse(stdin)
		if err != nil {
			return
		}
		if conf.EventSocket == "" || conf.TimeoutSeconds <= 0 {
			t.Errorf("accepted without a socket or a time: %+v", conf)
		}
		event, err := describe(&skel.CmdArgs{StdinData: stdin, Args: args}, conf)
		if err != nil {
			return
		}
		for _, ip := range event.IPs {
			if _, err := netip.ParsePrefix(ip.Address); err != nil {
				t.Errorf("accepted address %q: %v", ip.Address, err)
			}
		}
		concerns(conf, event)
	})
}
