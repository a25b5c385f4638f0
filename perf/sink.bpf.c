// The egress side of a TCP peer that exists nowhere: data is noted and swallowed, connections are opened and closed.
// What is swallowed here was never copied: the packet goes as it would at a network card when it was sent. The other
// half, perf/sink.py, reads `state` and sends the acknowledgements. Segments must not be cut and turned round here:
// changing a packet's tail copies its payload.
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define PEER_FIRST_SEQUENCE 0x10000000

// Read by perf/sink.py, field for field.
struct state {
    __u64 packets; // of data, since the connection was opened
    __u64 tail;    // the last 8 bytes of the last segment
    __u32 next;    // what the peer acknowledges
    __u32 address; // the sender's, as on the wire, like its port
    __u16 port;
    __u16 unused[3];
};

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __uint(map_flags, BPF_F_MMAPABLE);
    __type(key, __u32);
    __type(value, struct state);
} state SEC(".maps");

static __always_inline int turn_round(struct __sk_buff *skb, __u32 payload, __u32 next)
{
    if (payload) {
        // Only a FIN that has data with it.
        if (bpf_skb_change_tail(skb, skb->len - payload, 0))
            return TC_ACT_SHOT;
    }
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct ethhdr *eth = data;
    struct iphdr *ip = data + sizeof(*eth);
    struct tcphdr *tcp = (void *)(ip + 1);
    if ((void *)(tcp + 1) > end)
        return TC_ACT_SHOT;
    __u8 mac[ETH_ALEN];
    __builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
    __builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
    __builtin_memcpy(eth->h_source, mac, ETH_ALEN);
    __u32 address = ip->saddr;
    ip->saddr = ip->daddr;
    ip->daddr = address;
    __u16 port = tcp->source;
    tcp->source = tcp->dest;
    tcp->dest = port;
    tcp->seq = tcp->syn ? bpf_htonl(PEER_FIRST_SEQUENCE) : tcp->ack_seq;
    tcp->ack_seq = bpf_htonl(next);
    tcp->ack = 1;
    tcp->psh = 0;
    tcp->window = bpf_htons(65535);
    if (payload) {
        __u16 before = ip->tot_len, after = bpf_htons(bpf_ntohs(before) - payload);
        ip->tot_len = after;
        bpf_l3_csum_replace(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, check), before, after, 2);
    }
    return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

SEC("tc")
int sink(struct __sk_buff *skb)
{
    if (bpf_skb_pull_data(skb, sizeof(struct ethhdr) + sizeof(struct iphdr) + sizeof(struct tcphdr)))
        return TC_ACT_OK;
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct ethhdr *eth = data;
    struct iphdr *ip = data + sizeof(*eth);
    struct tcphdr *tcp = (void *)(ip + 1);
    if ((void *)(tcp + 1) > end || eth->h_proto != bpf_htons(ETH_P_IP) || ip->ihl != 5 || ip->protocol != IPPROTO_TCP)
        return TC_ACT_OK;
    __u32 key = 0;
    struct state *shared = bpf_map_lookup_elem(&state, &key);
    if (!shared || tcp->dest != bpf_htons(SINK_PORT))
        return TC_ACT_OK;

    __u32 payload = skb->len - sizeof(*eth) - sizeof(*ip) - 4 * tcp->doff;
    if (tcp->rst || (!payload && !tcp->syn && !tcp->fin))
        return TC_ACT_STOLEN;
    __u32 next = bpf_ntohl(tcp->seq) + payload + tcp->syn + tcp->fin;
    if (tcp->syn) {
        shared->packets = 0;
        shared->address = ip->saddr;
        shared->port = tcp->source;
        *(volatile __u32 *)&shared->next = next;
    }
    if (tcp->syn || tcp->fin)
        return turn_round(skb, payload, next);
    if ((__s32)(next - shared->next) > 0) {
        __u64 tail = 1;
        if (payload >= sizeof(tail))
            bpf_skb_load_bytes(skb, skb->len - sizeof(tail), &tail, sizeof(tail));
        shared->tail = tail;
        shared->packets++;
        // Last: it is what the other half waits for.
        *(volatile __u32 *)&shared->next = next;
    }
    return TC_ACT_STOLEN;
}

char _license[] SEC("license") = "GPL";
