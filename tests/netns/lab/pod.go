package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// PodSpec says what pod to make.
type PodSpec struct {
	Namespace, Name string
	// ServiceAccount is "default" if empty.
	ServiceAccount string
	// Node is the node's index in World.Nodes.
	Node                int
	Labels, Annotations map[string]string
}

// Pod is a network namespace on a node, with a program in it that serves (PortHTTP, PortTCP) and calls.
type Pod struct {
	PodSpec
	UID string
	// Addrs are the pod's IPv4 and IPv6 address.
	Addrs []netip.Addr

	node   *Node
	id     string // of its container, in the runtime's words
	thread *thread
	host   string // the node's end of its link
	netns  string // where the node sees its namespace
	cgroup string
	// One of them is what runs in the pod.
	program  *program
	waypoint *process
	// proxy is the pod's own, or nil.
	proxy *process
}

// Pod makes a pod as a kubelet and its runtime would: the object, a namespace with an interface, the CNI plugins of
// the node's configuration, and only when those succeed, the program.
func (w *World) Pod(ctx context.Context, spec PodSpec) (*Pod, error) {
	if spec.ServiceAccount == "" {
		spec.ServiceAccount = "default"
	}
	return w.pod(ctx, spec, (*Pod).startApplication)
}

// pod makes a pod and calls start to start what runs in it.
func (w *World) pod(ctx context.Context, spec PodSpec, start func(*Pod, context.Context) error) (*Pod, error) {
	p := newPod(w.Nodes[spec.Node], spec)
	err := w.step(fmt.Sprintf("pod %s/%s on %s", spec.Namespace, spec.Name, p.node.Name), func() error {
		if err := p.create(ctx); err != nil {
			return err
		}
		return start(p, ctx)
	})
	if err != nil {
		return nil, errors.Join(err, w.RemovePod(ctx, p))
	}
	w.mu.Lock()
	w.pods = append(w.pods, p)
	w.mu.Unlock()
	return p, w.publish(p)
}

// newPod gives a pod its names and addresses.
func newPod(n *Node, spec PodSpec) *Pod {
	n.mu.Lock()
	n.pods++
	number := n.pods
	n.mu.Unlock()
	p := &Pod{PodSpec: spec, UID: uuid.NewString(), node: n, id: uuid.NewString()}
	for _, prefix := range podPrefixes(n.index) {
		p.Addrs = append(p.Addrs, hostOf(prefix, number+1))
	}
	p.host, p.netns = fmt.Sprintf("pod%d", number), "/run/netns/cni-"+p.id
	p.cgroup = filepath.Join(n.cgroup, "kubepods", "besteffort", "pod"+p.UID, p.id)
	return p
}

func (p *Pod) create(ctx context.Context) error {
	n := p.node
	if err := os.MkdirAll(p.cgroup, 0o755); err != nil {
		return err
	}
	if err := n.world.objects.put("v1", "Pod", p.object(corev1.PodPending)); err != nil {
		return err
	}
	var err error
	if p.thread, err = newThread(p.enter); err != nil {
		return err
	}
	if err := n.thread.do(p.wire); err != nil {
		return err
	}
	if err := p.thread.do(func() error { return addressPod(p.Addrs, n.gateways()) }); err != nil {
		return err
	}
	if err := p.cni(func(c *libcni.CNIConfig, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) error {
		_, err := c.AddNetworkList(ctx, list, rt)
		return err
	}); err != nil {
		return fmt.Errorf("CNI ADD: %w", err)
	}
	return nil
}

// Do calls f in the pod's network namespace, as a process of the pod with all capabilities could.
func (p *Pod) Do(f func() error) error { return p.thread.do(f) }

// startApplication starts the program that serves and calls.
func (p *Pod) startApplication(context.Context) error {
	n := p.node
	var err error
	p.program, err = p.thread.startProgram(filepath.Join(n.world.Dir, "log"), command{
		name: "pod." + p.Namespace + "." + p.Name, path: filepath.Join(n.cniBin(), podProgram), cgroup: p.cgroup,
		env: []string{"POD_NAME=" + p.Name},
	})
	return err
}

// resolvConf is what pods find in /etc/resolv.conf. Nobody has the resolver's address: only the mesh answers there.
const resolvConf = "nameserver 192.0.2.53\nsearch %[1]s.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5 timeout:1 attempts:1\n"

// enter makes the calling thread one of the pod: a network of its own, and files by which names are looked up.
func (p *Pod) enter() error {
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("unshare namespaces", err)
	}
	if err := mountHosts(filepath.Join(p.node.dir, "hosts")); err != nil {
		return err
	}
	resolvers := filepath.Join(p.node.dir, "resolv.conf."+p.Namespace)
	if err := os.WriteFile(resolvers, fmt.Appendf(nil, resolvConf, p.Namespace), 0o644); err != nil {
		return err
	}
	if err := unix.Mount(resolvers, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount /etc/resolv.conf: %w", err)
	}
	return nil
}

// wire makes the pod's link and shows the pod's namespace where a runtime would, on the node's thread.
func (p *Pod) wire() error {
	if err := os.WriteFile(p.netns, nil, 0o444); err != nil {
		return err
	}
	source := fmt.Sprintf("/proc/self/fd/%d", p.thread.net.Fd())
	if err := unix.Mount(source, p.netns, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s: %w", p.netns, err)
	}
	if err := wirePod(p.thread.net, p.host, p.Addrs, p.node.gateways()); err != nil {
		return err
	}
	text, err := json.Marshal(wireResult(p.netns, p.host, p.Addrs, p.node.gateways()))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(p.node.cniResults(), p.id+".json"), text, 0o644)
}

// cni calls the plugins of the node's configuration list from inside the node.
func (p *Pod) cni(do func(*libcni.CNIConfig, *libcni.NetworkConfigList, *libcni.RuntimeConf) error) error {
	n := p.node
	files, err := libcni.ConfFiles(n.cniConf(), []string{".conflist"})
	if err != nil || len(files) == 0 {
		return errors.Join(fmt.Errorf("no CNI configuration in %s", n.cniConf()), err)
	}
	slices.Sort(files)
	list, err := libcni.NetworkConfFromFile(files[0])
	if err != nil {
		return err
	}
	rt := &libcni.RuntimeConf{
		ContainerID: p.id, NetNS: p.netns, IfName: "eth0",
		Args: [][2]string{
			{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", p.Namespace}, {"K8S_POD_NAME", p.Name},
			{"K8S_POD_INFRA_CONTAINER_ID", p.id}, {"K8S_POD_UID", p.UID},
		},
	}
	return n.thread.do(func() error {
		return do(libcni.NewCNIConfigWithCacheDir([]string{n.cniBin()}, filepath.Join(n.dir, "cni", "cache"), nil), list, rt)
	})
}

// Check asks the plugins whether the pod is still as they made it (CNI CHECK).
func (p *Pod) Check(ctx context.Context) error {
	return p.cni(func(c *libcni.CNIConfig, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) error {
		return c.CheckNetworkList(ctx, list, rt)
	})
}

// delPatience bounds the runtime's CNI DEL.
const delPatience = 10 * time.Second

// RemovePod ends a pod's programs, calls CNI DEL and takes its namespace away.
func (w *World) RemovePod(ctx context.Context, p *Pod) error {
	w.mu.Lock()
	w.pods = slices.DeleteFunc(w.pods, func(other *Pod) bool { return other == p })
	w.mu.Unlock()
	var errs []error
	p.program.end()
	errs = append(errs, p.waypoint.stop(stopPatience), p.proxy.stop(stopPatience))
	if p.thread != nil {
		ctx, cancel := context.WithTimeout(ctx, delPatience)
		defer cancel()
		err := p.cni(func(c *libcni.CNIConfig, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) error {
			return c.DelNetworkList(ctx, list, rt)
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("CNI DEL of %s: %w", p.Name, err))
		}
	}
	errs = append(errs, w.objects.remove(fileName("Pod", p.Namespace, p.Name)), w.publishEndpoints())
	if p.thread != nil {
		errs = append(errs, p.node.thread.do(func() error {
			if err := unix.Unmount(p.netns, unix.MNT_DETACH); err != nil {
				return fmt.Errorf("unmount %s: %w", p.netns, err)
			}
			return os.Remove(p.netns)
		}))
		p.thread.end()
	}
	errs = append(errs, removeCgroup(filepath.Dir(p.cgroup)))
	return errors.Join(errs...)
}

// Label sets the pod's labels, all of them, while it runs.
func (p *Pod) Label(labels map[string]string) error {
	p.Labels = labels
	return p.node.world.publish(p)
}

// Annotate sets the pod's annotations, all of them, while it runs.
func (p *Pod) Annotate(annotations map[string]string) error {
	p.Annotations = annotations
	return p.node.world.publish(p)
}

// publish writes the pod as running, and the endpoints of the services it backs.
func (w *World) publish(p *Pod) error {
	if err := w.objects.put("v1", "Pod", p.object(corev1.PodRunning)); err != nil {
		return err
	}
	return w.publishEndpoints()
}

func (p *Pod) object(phase corev1.PodPhase) *corev1.Pod {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.UID), Labels: p.Labels, Annotations: p.Annotations,
		},
		Spec: corev1.PodSpec{
			NodeName: p.node.Name, ServiceAccountName: p.ServiceAccount,
			Containers: []corev1.Container{{Name: "app", Image: "lab", Ports: []corev1.ContainerPort{
				{Name: "http", ContainerPort: PortHTTP}, {Name: "tcp", ContainerPort: PortTCP},
			}}},
		},
		Status: corev1.PodStatus{Phase: phase, HostIP: p.node.Addrs[0].String()},
	}
	for _, a := range p.node.Addrs {
		pod.Status.HostIPs = append(pod.Status.HostIPs, corev1.HostIP{IP: a.String()})
	}
	if phase != corev1.PodRunning {
		return pod
	}
	pod.Status.PodIP = p.Addrs[0].String()
	for _, a := range p.Addrs {
		pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	for _, c := range []corev1.PodConditionType{corev1.PodReady, corev1.ContainersReady, corev1.PodInitialized, corev1.PodScheduled} {
		pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: c, Status: corev1.ConditionTrue})
	}
	return pod
}

// Call makes the pod's program try a call.
func (p *Pod) Call(ctx context.Context, c Call) (Answer, error) { return p.program.call(ctx, c) }

// Addr is the pod's address and port; v6 chooses the family.
func (p *Pod) Addr(port uint16, v6 bool) string {
	i := 0
	if v6 {
		i = 1
	}
	return netip.AddrPortFrom(p.Addrs[i], port).String()
}

// Identity is the SPIFFE ID that the pod's service account gets.
func (p *Pod) Identity() string {
	return fmt.Sprintf("spiffe://cluster.local/ns/%s/sa/%s", p.Namespace, p.ServiceAccount)
}

// PID is the process id of the pod's program, to show that it is the same one as before.
func (p *Pod) PID() int { return p.program.cmd.Process.Pid }
